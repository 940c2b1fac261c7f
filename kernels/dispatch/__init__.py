"""Which kernel serves a product: routes, one table a format, and what was measured."""
