"""Block importance: what each transformer block is worth."""
