"""How numbers behave: bits of small floats, ordered sums, the one JIT decorator and its SIMD type."""
