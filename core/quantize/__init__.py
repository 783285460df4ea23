"""Weight-only quantization: int8 and int4 variants that stock transformers loads."""
