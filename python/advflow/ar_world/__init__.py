"""The embedded world for autoregressive models: its scenes as tokens, and a small pretrained LlamaGen."""
