"""Bundle → engines: compiles a bundle for one machine and checks the result; `build-engine`.

from turbochain.engines import build

build("stabilityai/sd-turbo", "sd-turbo.bundle")
"""

from turbochain.engines.build import BuildResult, build

__all__ = ["BuildResult", "build"]
