"""Raw preference data to clean pairs and a report of every drop; `pipeline.prepare` is the way through."""
