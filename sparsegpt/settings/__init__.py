"""How to prune: settings and presets, recipes for single layers, and which layers are meant."""
