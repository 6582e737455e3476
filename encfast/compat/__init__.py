"""Other packages' interfaces on encfast's ops. `import encfast` imports none of them."""
