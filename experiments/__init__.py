"""The ``snail`` command, one YAML per published row, benchmarks and results."""
