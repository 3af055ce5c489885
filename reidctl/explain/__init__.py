"""Explanation maps and the numbers that test them."""
