"""Pictures, captions and cached features, in an order that one integer fixes (docs/data.md)."""
