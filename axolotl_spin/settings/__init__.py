"""The keys of the `spin:` block: bounds, defaults and what they mean."""
