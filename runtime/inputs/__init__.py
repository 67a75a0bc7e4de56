"""What a call feeds into a chain: token ids, noise and what is cached of them."""
