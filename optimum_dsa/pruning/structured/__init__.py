"""What can go from a model as a whole: channels of an MLP, heads, and what makes a model smaller by them."""
