"""The families that the engine decodes: config.json to a spec, one file a family."""
