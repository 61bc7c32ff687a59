"""Autoregressive image models: LlamaGen's and minGPT's transformers, their VQ tokenizers, sampling and scoring."""
