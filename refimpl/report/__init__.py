"""Result objects to terminal and JSON: pure functions."""
