"""A small LLaVA, trained from scratch: which digit is in a cell of a canvas?"""
