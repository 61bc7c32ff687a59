"""Whole sets of images, by the features of an extractor: their moments, distances, and what one image adds to a set."""
