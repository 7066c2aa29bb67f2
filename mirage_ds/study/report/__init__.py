"""From a study's results to its report: JSON, CSV, Markdown, figures and one HTML page.

statistics   intervals over seeds and records together, paired tests, equivalence
grid         cells → matrices of scores whose rows are seeds and whose columns are records
build        results → the report as a plain dict (what report.json holds)
contrasts    its contrasts, with tests and verdicts
controls     its controls, from each record's answers
text         the dict → Markdown (by report.md.jinja), HTML from that Markdown, CSV
figures      the dict → figures of scores, contrasts, controls and cost
sweeps       figures that need more than the dict's numbers: learning curves, scores against settings
write        all of it into a folder
"""
