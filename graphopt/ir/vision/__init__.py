"""Vision-language models: where images enter the text, and what encodes them."""
