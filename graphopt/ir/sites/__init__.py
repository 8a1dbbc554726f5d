"""Sites other than attention: feed-forward, norms, rotary embeddings."""
