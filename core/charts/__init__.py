"""Tables in, Plotly figures out; one palette for all pages."""
