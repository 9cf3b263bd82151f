"""Knowledge distillation for NLP on JAX, with TextBrewer's configs and numbers."""
