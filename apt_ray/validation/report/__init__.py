"""The report of an evaluation: one HTML page that needs nothing but itself."""

from apt_ray.optional import require

require("matplotlib", extra="report")
