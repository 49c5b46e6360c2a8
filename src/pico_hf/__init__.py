"""PICO for Hugging Face vision-text dual encoders."""
