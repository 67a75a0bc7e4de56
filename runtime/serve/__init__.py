"""Serve bundles over HTTP and WebSocket: `turbochain serve`. Needs the extra `serve`."""
