from __future__ import annotations
import subprocess, time, socket, threading, hashlib, os
from harness import Ctr, new_id
def sh(command: str) -> str:
    result = subprocess.run(["sh", "-ec", command], capture_output=True, text=True)
    assert result.returncode == 0, f"{command}: {result.stderr}"
    return result.stdout


def test_first(ctr: Ctr) -> None:
    sh("""ip netns add t; ip link add v0 type veth peer name eth0; ip link set eth0 netns t; ip link set v0 up; ip addr add 10.9.0.1/24 dev v0
    ip -n t link set eth0 up  ; ip -n t addr add 10.9.0.2/24 dev eth0""")
    N=200<<20
    chunk=os.urandom(1<<20)
    def serve_send(s):
        c,_=s.accept()
        for i in range(N>>20): c.sendall(chunk)
        c.shutdown(socket.SHUT_WR)
    got=[0,0]
    def serve_recv(s):
        c,_=s.accept()
        h=hashlib.sha256()
        while d:=c.recv(1<<20): got[0]+=len(d); h.update(d)
        got[1]=h.hexdigest()
    s1=socket.create_server(("10.9.0.1",5001)); s2=socket.create_server(("10.9.0.1",5002))
    with ctr.detached(new_id("net"), "sleep", "1000", options=("--with-ns", "network:/run/netns/t")) as pod:
        print(ctr.exec(pod, "sh", "-c", "busybox --list | tr '\\n' ' '; ethtool -k eth0; nc --help 2>&1").stdout.decode())
        for cmd in ("nc 10.9.0.1 5001 </dev/null >/dev/null", "nc 10.9.0.1 5001 </dev/null | sha256sum", "nc 10.9.0.1 5001 </dev/null | nc 10.9.0.1 5002"):
            threading.Thread(target=serve_send,args=(s1,)).start()
            if "5002" in cmd:
                t2=threading.Thread(target=serve_recv,args=(s2,)); t2.start()
            t=time.time(); print(ctr.exec(pod,"sh","-c",cmd).stdout); print(cmd, time.time()-t)
        t2.join(); print(got, time.time()-t)
    sh("ip netns del t")
    assert 0
