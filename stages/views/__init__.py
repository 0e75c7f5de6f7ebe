"""Views: augmented versions of a sample that teacher and student both see, bit for bit."""
