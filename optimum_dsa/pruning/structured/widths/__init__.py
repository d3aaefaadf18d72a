"""How many structures go from where: what they cost, what the dense model shows of them, and allocations of them."""
