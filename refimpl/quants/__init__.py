"""Block formats: one module each, with its twins (X.py defines, X_jit.py runs anywhere, X_simd.py is fast)."""
