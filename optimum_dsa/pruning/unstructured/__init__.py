"""Single weights: metrics, patterns, updates of what stays, and the published combinations."""
