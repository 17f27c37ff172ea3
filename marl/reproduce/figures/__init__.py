"""The figures of the paper: for each what it claims, which runs it needs, and what is measured of them."""
