"""The report of an evaluation: one HTML page that needs nothing but itself."""

from apt_ray.validation.report.html import write_report as write_report
