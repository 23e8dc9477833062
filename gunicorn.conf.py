"""What gunicorn reads by itself, wherever it is started: one line of the log for each request."""

accesslog = "-"
access_log_format = '%(h)s "%(r)s" %(s)s %(B)s bytes %(M)s ms [%({x-request-id}o)s]'
