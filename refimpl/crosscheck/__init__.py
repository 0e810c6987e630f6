"""Two engines side by side: what another implementation computes, held against the reference."""
