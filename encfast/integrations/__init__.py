"""Hooks of other libraries that encfast fills. `import encfast` imports none of them."""
