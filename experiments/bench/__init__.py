"""``snail bench``: how fast the package is, each time as a ratio against the plain way, on this machine."""
