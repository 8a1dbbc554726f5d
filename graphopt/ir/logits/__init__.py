"""Several language models in one graph: their logits combined, their linears shared."""
