"""The families that the engine decodes: config.json to spec, one file per family."""
