"""The stages of verify: container, census, recipe, experts, requantize, fidelity, verdict."""
