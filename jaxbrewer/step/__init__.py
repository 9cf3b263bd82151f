"""The one compiled function: losses, gradient, update, metrics."""
