"""Encoders with Hugging Face import and export."""
