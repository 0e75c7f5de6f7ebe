"""The encodings of a teacher's logits: how each lies in a store, and what it loses."""
