"""`titans reproduce`: what the paper claims, tested against every system it names."""
