"""From a study's results to its report: JSON, CSV, Markdown, figures and one HTML page.

statistics   intervals over seeds and records together, paired tests, equivalence
grid         cells → matrices of scores whose rows are seeds and whose columns are records
build        results → the report as a plain dict (what report.json holds)
contrasts    its contrasts, with tests and verdicts
answers      its controls, from each record's answers
tables       the dict → tables of text and sentences, the same for Markdown and HTML
figures      the dict → figures of scores, contrasts and cost
control_figures   … and of the controls
sweeps       figures that need more than the dict's numbers: learning curves, scores against settings
markdown, sheet, page   the dict → Markdown, CSV, HTML
write        all of it into a folder
"""
