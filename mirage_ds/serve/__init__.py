"""`mirage-ds serve`: a model folder behind OpenAI's chat completions, over the continuous decoder.

engine    a thread that decodes whatever is asked, all rows together
body      a request's JSON → what is asked, with each fault's status
prompt    messages and pictures → the encoded prompt that training saw
choices   tokens as they come → texts, stops, usage
app       the routes, errors and metrics
spec      the flags
command   `mirage-ds serve`: loads, listens, stops
"""
