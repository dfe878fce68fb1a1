"""The configuration: files, rules, matches, templates."""
