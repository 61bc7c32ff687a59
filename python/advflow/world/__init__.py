"""The embedded world: scenes of coloured shapes, their captions, a reward, and a small pretrained pipeline."""
