"""The bundled tools: data to the daemon, run only in workers, never imported as code."""
