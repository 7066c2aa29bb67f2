"""From a study's results to its report: JSON, CSV, Markdown, figures and one HTML page.

statistics   cells → matrices of scores; intervals over seeds and records together, paired tests, equivalence
build        results → the report as a plain dict (what report.json holds) with contrasts and controls, and its folder
text         the dict → Markdown (by report.md.jinja), HTML from that Markdown, CSV
figures      the dict → figures of scores, contrasts, controls, settings; learning curves
"""
