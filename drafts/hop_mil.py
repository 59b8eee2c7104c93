import torch, math, sys, time
from torch import nn
import benchtop as bt
torch.set_num_threads(1)
data=bt.load("digits")
L=int(sys.argv[1]); STEPS=int(sys.argv[2]); NB=int(sys.argv[3]) if len(sys.argv)>3 else 0
class Hop(nn.Module):
    def __init__(s,d,dk):
        super().__init__(); s.state=nn.Parameter(.02*torch.randn(1,d)); s.nY=nn.LayerNorm(d); s.nR=nn.LayerNorm(d); s.nV=nn.LayerNorm(d)
        s.Wq=nn.Linear(d,dk); s.Wk=nn.Linear(d,dk); s.Wv=nn.Linear(d,dk); s.Wo=nn.Linear(dk,d)
        for l in (s.Wq,s.Wk,s.Wv): nn.init.xavier_uniform_(l.weight); nn.init.zeros_(l.bias)
    def forward(s,Y,beta):
        K=s.Wk(s.nY(Y)); V=s.Wv(s.nV(Y)); xi=s.Wq(s.nR(s.state))
        return s.Wo(((beta*xi@K.transpose(-2,-1)).softmax(-1)@V))[...,0,:]
class Att(nn.Module):
    def __init__(s,d,dk): super().__init__(); s.V=nn.Linear(d,dk); s.w=nn.Linear(dk,1)
    def forward(s,Y,beta): return ((beta*s.w(torch.tanh(s.V(Y)))).softmax(-2)*Y).sum(-2)
class Mean(nn.Module):
    def __init__(s,d,dk): super().__init__()
    def forward(s,Y,beta): return Y.mean(-2)
class Max(nn.Module):
    def __init__(s,d,dk): super().__init__()
    def forward(s,Y,beta): return Y.amax(-2)
class Net(nn.Module):
    def __init__(s,pool):
        super().__init__(); s.enc=nn.Sequential(nn.Linear(64,32),nn.ReLU()); s.pool=pool(32,16); s.out=nn.Linear(32,1)
    def forward(s,x,beta): return s.out(s.pool(s.enc(x.flatten(-3)),beta))[...,0]
def bags(part,g,n,L=L):
    nine=torch.where(part.y==9)[0]; other=torch.where(part.y!=9)[0]
    y=torch.randint(0,2,(n,),generator=g)
    idx=other[torch.randint(len(other),(n,L),generator=g)]
    idx[:,0]=torch.where(y==1,nine[torch.randint(len(nine),(n,),generator=g)],idx[:,0])
    return idx,y.float()
if NB:
    bi,by=bags(data.train,torch.Generator().manual_seed(7),NB)
    def sample(g):
        k=torch.randint(NB,(32,),generator=g); return data.train.x[bi[k]],by[k]
else:
    def sample(g): i,y=bags(data.train,g,32); return data.train.x[i],y
vi,vy=bags(data.validation,torch.Generator().manual_seed(1),400)
vx=data.validation.x[vi]
def ev_at(beta):
    def ev(m):
        s=m(vx,m.beta if hasattr(m,'beta') else beta); a=(s[vy==1][:,None]-s[vy==0]); return {"auc":(a>0).float().mean(),"loss":nn.functional.binary_cross_entropy_with_logits(s,vy)}
    return ev
for name,pool,betas in (("mean",Mean,[1.]),("max",Max,[1.]),("att",Att,[1.,4.]),("hop",Hop,[.25,1.,4.])):
    for beta in betas:
        t=time.time()
        r=bt.fit(lambda: Net(pool),lambda m,b: nn.functional.binary_cross_entropy_with_logits(m(b[0],beta),b[1]),sample,steps=STEPS,seeds=range(3),lr=[1e-3,3e-3,1e-2,3e-2,1e-1],evaluate=ev_at(beta),eval_every=STEPS,arm=name)
        h=r.history; h=h[(h.step==STEPS)]
        p=h.groupby(["metric","lr"])["value"].mean().unstack()
        print(name,beta,f"{time.time()-t:.1f}s"); print(p.round(4).to_string(),flush=True)
