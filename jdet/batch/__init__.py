"""Files of requests in, files of results out: `jdet run-batch`."""
