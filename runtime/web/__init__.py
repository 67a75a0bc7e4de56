"""A site that draws in the browser of whoever visits it: `turbochain export-web`. README.md says how to host it."""

from turbochain.runtime.web.site import export_web

__all__ = ["export_web"]
