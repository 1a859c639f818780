"""One merge method a file; ``merging.method.all_methods`` imports them all."""
